# What a developer does here. `make test` is the one command that sets up everything it
# needs and runs every test; .ci/run calls it and nothing else.

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOSEC       := github.com/securego/gosec/v2/cmd/gosec@v2.30.0
REDOCLY     := @redocly/cli@1.34.5
SPECTRAL    := @stoplight/spectral-cli@6.16.3

.PHONY: run build release reproducible test setup lint unit twice deep check torture soak bench siege fuzz picture

run: ## the server, with its data in gapless-data
	go run .

build: ## the binary
	CGO_ENABLED=0 go build -trimpath -o gapless .

release: ## binaries for Linux, macOS and Windows, and SHA256SUMS, in release/
	./deploy/release.sh release

reproducible: release ## the same again, in a clone elsewhere that has nothing compiled: equal to the byte
	@dir=$$(mktemp -d) && trap 'chmod -R u+w "$$dir"; rm -rf "$$dir"' EXIT && \
	git clone -q . "$$dir/clone" && GOCACHE="$$dir/cache" VERSION="$$(git describe --tags --always --dirty)" "$$dir/clone/deploy/release.sh" "$$dir/out" >/dev/null && \
	diff release/SHA256SUMS "$$dir/out/SHA256SUMS" && echo "two builds are equal"

test: setup lint unit ## everything

# What the tests need beside Go: a real Redis, a real browser, Node for client libraries.
setup:
	@./.ci/setup

lint:
	@echo "== format, vet, fix, tidy"
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "gofmt -w these files"; exit 1; }
	go vet ./...
	@test -z "$$(go fix -diff ./... 2>&1)" || { go fix -diff ./...; echo "go fix ./..."; exit 1; }
	go mod tidy -diff
	@echo "== linters"
	go run $(STATICCHECK) ./...
	go run $(GOSEC) -quiet -conf .gosec.json -exclude-dir=.ci -exclude-dir=testdata ./...
	@echo "== known vulnerabilities"
	go vet ./.ci/vulncheck
	go run ./.ci/vulncheck
	@echo "== deploy: what can be held against its own tools, without being run"
	cd deploy/lint && go mod tidy -diff && go vet ./... && go test -count=1 -timeout 1h ./...
	@echo "== openapi.yaml"
	npx --yes $(REDOCLY) lint --extends recommended-strict openapi.yaml
	npx --yes --ignore-scripts $(SPECTRAL) lint --fail-severity hint --ruleset .spectral.yaml openapi.yaml

# What starts programs comes first, alone: it mostly waits, so six tests run at a time. Then the packages, with the longest one
# next to the others. Then a build without a cache, and the explorer, deeper than the race detector lets it go in a reasonable
# time. A test gives up when nothing has happened for a while (store/storetest/patience.go); the hour is for what never stands still.
unit:
	go test -race -count=1 -timeout 1h -parallel 6 -skip TestRelease ./test
	go test -race -count=1 -timeout 1h -p 3 ./web $$(go list ./... | grep -v -e '/test$$' -e '/web$$')
	$(MAKE) -j 2 -O twice deep

twice:
	go test -race -count=1 -timeout 0 -run TestRelease ./test

deep:
	go test -count=1 -timeout 1h -run 'TestExplorer_everyOrder$$' ./sse

# A minute, while you work: make check.
check: ## format, vet, and the tests that start no programs
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "gofmt -w these files"; exit 1; }
	go vet ./...
	go test -short -count=1 -timeout 10m -parallel 16 $$(go list ./... | grep -v -e '/test$$' -e '/web$$')

# Three nodes, a Redis, producers and viewers, and whatever can happen to them, from a seed:
# make torture FOR=10m SEED=7; ARGS=-torture.tls has all of it over TLS and HTTP/2, ARGS=-torture.embedded one node on disk
FOR  := 3m
SEED := 0
torture: setup ## the fault test, and its table
	go test -count=1 -timeout 0 -run 'TestTorture$$' -v ./test -torture.for $(FOR) -torture.seed $(SEED) $(ARGS)
	go test -count=1 -timeout 0 -run 'TestExplorer' -v ./sse -explorer.deeper 1 -explorer.for $(FOR) -explorer.seed $(SEED)

soak: setup ## ten minutes of three hundred sessions: memory stays as it is
	go test -count=1 -timeout 0 -run 'TestTorture$$' -v ./test -torture.for 10m -torture.faults=false -torture.sessions 300 -torture.pace 1s

# The scenarios of test/bench_linux_test.go, beside a server that checks nothing; a quarter of an
# hour on two idle cores. ONLY is a part of their names: make bench RUNS=1 ONLY=fanout
RUNS := 3
ONLY :=
bench: setup ## what a chunk and an append cost, and how fast the whole is: a table
	$(if $(ONLY),,go test -run xxx -bench . -benchmem ./sse ./store)
	go test -count=1 -timeout 0 -run xxx -bench 'Scenarios$$/$(ONLY)' -benchtime 1x ./test -scenarios.runs $(RUNS)

# What one caller can do to the others: test/siege_test.go. FOR is how long each attack lasts, ONLY a regular expression of their names.
siege: FOR := 20s
siege: setup ## every attack next to a neighbour, and the table: memory, Redis, the neighbour's times, refusals
	go test -count=1 -timeout 0 -run xxx -bench 'Siege$$' -benchtime 1x ./test -siege.for $(FOR) -siege.only '$(ONLY)'

picture: setup ## the README's moving picture: the page's own show, filmed in Chromium
	go test -count=1 -timeout 0 -run TestPicture_ -v ./web -picture

fuzz: ## each fuzz target for a while
	go test -count=1 -run TestElement_isReadAsAnybodyReadsIt ./store -elements 1000000
	go test -run xxx -fuzz FuzzParseChunk -fuzztime 30s ./store
	go test -run xxx -fuzz FuzzEvent -fuzztime 30s ./sse
	go test -run xxx -fuzz FuzzParser -fuzztime 30s ./sse
	go test -run xxx -fuzz FuzzRaw -fuzztime 30s ./sse
	go test -run xxx -fuzz FuzzParseNumber -fuzztime 30s ./api
	go test -run xxx -fuzz FuzzText -fuzztime 30s ./api
	go test -run xxx -fuzz FuzzLines -fuzztime 30s ./api
	go test -run xxx -fuzz FuzzOpenAIAccess -fuzztime 30s ./api
	go test -run xxx -fuzz FuzzMay -fuzztime 30s ./api/auth
	go test -run xxx -fuzz FuzzRead -fuzztime 30s ./api/auth
