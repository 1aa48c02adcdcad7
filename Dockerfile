# syntax=docker/dockerfile:1
# A static binary and nothing else: no shell, no root, nothing that has to be updated but itself.
#   docker build --build-arg VERSION=$(git describe --tags --always) -t gapless .

FROM --platform=$BUILDPLATFORM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=unknown
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /gapless . && mkdir -m 0700 /data

FROM scratch
# Whom to trust: Redis over TLS, and whatever else is called by https.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /gapless /gapless
# Without GAPLESS_REDIS the data is here: give it a volume.
COPY --from=build --chown=65532:65532 /data /data
VOLUME /data
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
# A container is reached from outside, so it has to be told who may come in: -auth.
ENV GAPLESS_LISTEN=0.0.0.0:8080 GAPLESS_LOG_FORMAT=json GAPLESS_REDIS=embedded:/data
EXPOSE 8080
# Alive, and not ready: a node that waits for Redis is not helped by a restart.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["/gapless", "live", "http://127.0.0.1:8080"]
ENTRYPOINT ["/gapless"]
