#!/usr/bin/env bash
# deploy/release.sh DIRECTORY builds the binaries of a release there, and SHA256SUMS. The same commit and the same Go make
# the same bytes, wherever and whenever they are built: no path, no time, no cache goes in.
#   VERSION=v1.2.3     else from git
#   COMMIT=…           else from git
#   PLATFORMS=linux/amd64
set -euo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

version=${VERSION:-$(git describe --tags --always --dirty)}
commit=${COMMIT:-$(git rev-parse HEAD)}
platforms=${PLATFORMS:-linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64 windows/arm64}

# What the environment of whoever builds could change.
unset GOFLAGS GOEXPERIMENT GOAMD64 GOARM64 GOFIPS140
export CGO_ENABLED=0

files=()
for platform in $platforms; do
  os=${platform%/*} arch=${platform#*/}
  file=gapless-$version-$os-$arch
  if [ "$os" = windows ]; then file+=.exe; fi
  echo "== $file"
  GOOS=$os GOARCH=$arch go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version -X main.commit=$commit" -o "$out/$file" .
  files+=("$file")
done
cd "$out"
sha256sum "${files[@]}" >SHA256SUMS
cat SHA256SUMS
