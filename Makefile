# The commands of this project; `make` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Stages run in the order written: a fast one that fails spares the slow ones.
.NOTPARALLEL:

# $(call stage,NAME,COMMAND): runs it and says how long it took.
stage = @printf '== %s\n' '$(1)'; started=$$SECONDS; \
	$(2) || { code=$$?; printf '== %s FAILED after %ds\n' '$(1)' $$((SECONDS - started)); exit $$code; }; \
	printf '== %s ok, %ds\n' '$(1)' $$((SECONDS - started))

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: test
test: test-format test-lint test-pure test-root test-valkey test-e2e ## Everything that CI needs, from fast to real

.PHONY: lint
lint: test-format test-lint ## Format and clippy, warnings denied

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all

.PHONY: test-format
test-format:
	$(call stage,format,cargo fmt --all --check)

.PHONY: test-lint
test-lint:
	$(call stage,lint,cargo --locked lint)

.PHONY: test-pure
test-pure: ## Core with its stories and their battery, journal, replay
	$(call stage,core journal replay,cargo --locked test -q -p valkeeper-core -p valkeeper-journal -p valkeeper-replay --features valkeeper-core/sim)

.PHONY: test-root
test-root: ## The operator's unit tests, house rules, generated files
	$(call stage,operator,cargo --locked test -q -p valkeeper --lib --bins --test tidy --test generated)

.PHONY: test-valkey
test-valkey: ## The operator's links and the agent against real valkey-servers
	$(call stage,real valkey,VALKEY_BIN_DIR=$$(tests/cluster/cluster valkey-bin) && export VALKEY_BIN_DIR && cargo --locked build -q -p valkeeper-agent && cargo --locked test -q -p valkeeper --test valkey && cargo --locked test -q -p valkeeper-agent)

.PHONY: test-e2e
test-e2e: ## The operator on a real control plane with real pods (root, Linux)
	$(call stage,end to end,tests/e2e/run)

.PHONY: battery
battery: ## The local journal: a kill at every write, power cuts, failing and full disks, damage; a table (root, some minutes)
	@tests/battery/run

.PHONY: demo
demo: ## A failover under load and its audit, on a cluster that it makes (DEMO_KEEP=0 removes everything)
	@examples/demo/run

.PHONY: cluster-up
cluster-up: ## The local cluster, with the operator's image in it
	@tests/e2e/setup

.PHONY: cluster-down
cluster-down: ## Remove the local cluster
	@tests/cluster/cluster down

.PHONY: bench
bench: cluster-up ## Journal next to bare fdatasync; write outage of ten kills, part by part, next to Valkey Sentinel (see cluster-down)
	@cargo bench -q --locked -p valkeeper-journal
	@tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench failover

.PHONY: bench-journal
bench-journal: ## Journal: durable appends, group commit, starts by length, next to a bare file and redb (some minutes)
	@cargo bench -q --locked -p valkeeper-journal -- --all

# Number of clusters.
CLUSTERS ?= 1000

.PHONY: bench-etcd
bench-etcd: cluster-up ## Journals of a thousand clusters in ConfigMaps: time of an append, what etcd takes (CLUSTERS=1000)
	@tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench config_maps -- $(CLUSTERS)

.PHONY: bench-sled
bench-sled: cluster-up ## The same kills with the journal in sled instead of ConfigMaps
	@VALKEEPER_JOURNAL=sled tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench failover -- --no-sentinel

# Options of the benchmark, such as "--rounds 5 --persistence off --no-agent".
LOSS ?=

.PHONY: bench-loss
bench-loss: cluster-up ## Acknowledged writes lost when a primary is killed: a plain StatefulSet next to Valkeeper (LOSS="--rounds 5")
	@tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench loss -- $(LOSS)

# Parts of it: "create kills reshard".
CLUSTER_PARTS ?=

.PHONY: bench-cluster
bench-cluster: cluster-up ## Topology Cluster: kills next to gossip, a million keys resharded next to bare MIGRATESLOTS and valkey-cli, time to Ready (CLUSTER_PARTS="kills")
	@tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench cluster -- $(CLUSTER_PARTS)

# Numbers of clusters, one step after the other.
MANY ?=

.PHONY: bench-many
bench-many: cluster-up ## Many clusters that nobody touches under one operator: memory, share of a core, reads and writes (MANY="10 24")
	@tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench many -- $(MANY)

# Options of it, such as "--faults kill,deleted --topologies Cluster --libraries go-redis,iovalkey --rounds 3 --jobs write,pool".
CLIENTS ?=

.PHONY: bench-clients
bench-clients: cluster-up ## Client libraries in default settings through kills, deletions, drains, switchovers, rollouts; a table (CLIENTS="--faults kill")
	@benches/clients/setup >/dev/null
	@tests/e2e/inside bench -q --locked --profile dev -p valkeeper --bench clients -- $(CLIENTS)
