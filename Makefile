# make demo   the main job on MovieLens        make test   every commit     make check  linters and types
# make demo DATA=path/to/ml-1m.zip             make test-real DATA=path/to/ml-1m.zip
# make demo SERVE=1   … and open its console   make test-system  heavy ones, with Chromium and Valkey
# make quick              tests of the rooms that the change touches; BASE=COMMIT, TESTS='-k NAME -x'
# make test-hosts         several hosts: trainings, Ray, a store in a bucket, Valkey, and cut cables; as root
# make test-spark         what the documents give to Spark, by a local Spark
# make test-image         the Dockerfile's steps without a container engine; as root, with debootstrap
# make bench DATA=path/to/ml-1m.zip           every number, hours; QUICK=1 minutes     make bench-gpu   on a GPU
# make golden BASE=main   every bit of trainings, exports, searches and replies, compared with a commit
# make changes            seven kinds added to the package for real, tested and counted
# make site               the site of the documents, into build/site/html
# make dist               the wheel, checked in clean environments of every Python here
# make versions           what is installed             make audit        its known vulnerabilities; asks pypi.org
# Every target makes .venv and installs what it needs.

PYTHON ?= python3
DATA ?= $(TWOTOWER_DATA)
# The published order of every user's films, where you have it: SEQUENCES=path/to/ml-1m-sequences.zip, and short
# histories of other items, a user a line: SHORT=path/to/beauty-sequences.zip
ORDER = $(if $(SEQUENCES),--sequences "$(SEQUENCES)") $(if $(SHORT),--short "$(SHORT)")
DATE ?= $(shell date +%F)
BIN = .venv/bin
SOURCES = src tests benchmarks examples main.py data_process

.DEFAULT_GOAL = help
.PHONY: help demo quick test test-system test-hosts test-spark test-image test-real check dist golden changes docs site versions audit bench-env bench bench-gpu clean

help:
	@sed -n 's/^# //p' Makefile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; run make PYTHON=path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: no venv module; on Debian: apt-get install python3-venv"; exit 2; }

# The bound of the extra torchrec, which the tests need: so torch, which is large, is downloaded once.
TORCH = torch<2.15

.venv/.run: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train]' '$(TORCH)'
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $$($(BIN)/python -c 'from twotower.train.torchrec.embeddings import torchrec_requirements; print(*torchrec_requirements())')
	@touch $@ .venv/.run

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' '$(TORCH)'
	@touch $@ .venv/.run

demo: .venv/.run
	@$(BIN)/twotower demo --run runs/demo $(if $(DATA),--data "$(DATA)") $(if $(SERVE),--serve)

# Files of tests side by side, one more than there are processors, as some wait; JOBS=0 runs them one after another.
JOBS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# Without bytecode each of these processes, and each that a test starts, would compile every file again.
test test-system: export PYTHONDONTWRITEBYTECODE =
test: .venv/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The packages of the extra dev are enough; test files that need others are named and left out.
quick: $(if $(wildcard .venv/.test),.venv/.test,.venv/.dev)
	@$(BIN)/python tests/quick.py $(if $(BASE),--base "$(BASE)") -- $(TESTS)

# Debian's packages are installed where that is allowed; elsewhere they must be there.
test-system: .venv/.test
	@{ command -v chromium && command -v valkey-server; } >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium valkey-server >/dev/null; } || \
	  { echo "error: chromium and valkey-server are needed; on Debian: apt-get install chromium valkey-server"; exit 2; }
	$(BIN)/python -m pytest -m system -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Hosts are namespaces of the kernel, which root makes. ANYWHERE=1: a kernel that permits none is no error.
test-hosts: .venv/.test
	@{ command -v ip && command -v valkey-server; } >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iproute2 valkey-server >/dev/null; } || \
	  { echo "error: iproute2 and valkey-server are needed; on Debian: apt-get install iproute2 valkey-server"; exit 2; }
	@if reason=$$($(BIN)/python tests/hosts.py); then $(BIN)/python -m pytest -m hosts; \
	  elif test -n "$(ANYWHERE)"; then echo "test-hosts: no test is run: $$reason"; \
	  else echo "error: $$reason"; exit 2; fi

# pyspark, hundreds of megabytes, is installed beside the environment of the other tests.
.venv-spark/.ready: .venv/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .venv-spark 'pyspark>=4.1,<5'
	@touch $@

test-spark: .venv-spark/.ready
	@command -v java >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq default-jre-headless >/dev/null; } || \
	  { echo "error: Java is needed, 17 or later; on Debian: apt-get install default-jre-headless"; exit 2; }
	PYTHONPATH=.venv-spark $(BIN)/python -m pytest -m spark

# The steps of the Dockerfile without a container engine, as root, on a Debian of debootstrap; minutes.
test-image: .venv/.test
	@ls dist/*.whl >/dev/null 2>&1 || { echo "error: dist/ has no wheel; run make dist BASE=1 first"; exit 2; }
	@command -v debootstrap >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap iproute2 >/dev/null; } || \
	  { echo "error: debootstrap and root are needed; on Debian: apt-get install debootstrap iproute2"; exit 2; }
	$(BIN)/python tests/image.py

test-real: .venv/.test
	@test -n "$(DATA)" || { echo "error: name the archive: make test-real DATA=path/to/ml-1m.zip"; exit 2; }
	TWOTOWER_DATA="$$(realpath "$(DATA)")" $(BIN)/python -m pytest -m real -s

check: .venv/.test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel and the source archive in dist/, checked in clean environments of every Python here; BASE=1 without a training.
.venv-dist/.ready: .venv/bin/python
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check 'build>=1.2,<2' 'twine>=6,<8'
	@touch $@

dist: .venv-dist/.ready
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python .ci/dist.py dist/*.whl $(if $(BASE),--base)

# Does this tree train, export, search and answer, to the bit, what a commit does? make golden BASE=main
golden: .venv/.test
	@test -n "$(BASE)" || { echo "error: name a commit: make golden BASE=main"; exit 2; }
	@old=$$(mktemp -d); trap 'git worktree remove --force "$$old/tree"; rm -rf "$$old"' EXIT; set -e; \
	  git worktree add --quiet --detach "$$old/tree" "$(BASE)"; \
	  PYTHONPATH="$$old/tree/src" $(BIN)/python "$$old/tree/tests/golden.py" record "$$old/old.json" --ranks; \
	  PYTHONPATH=src $(BIN)/python tests/golden.py record "$$old/new.json" --ranks; \
	  $(BIN)/python tests/golden.py compare "$$old/old.json" "$$old/new.json"

# Is a new kind one file and one registration? Seven are added in scratch worktrees, tested and counted.
changes: .venv/.test
	@$(BIN)/python tests/changes.py

docs: .venv/.test
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/house.py

# The site's builder lives in an environment of its own.
.venv-docs/.ready: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check \
	  $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["docs"], sep="\n")')
	@touch $@

site: .venv-docs/.ready
	.venv-docs/bin/python docs/site.py

# RELEASE=1 writes them into the notes of the newest release, in CHANGELOG.md.
versions: .venv/.test
	@$(BIN)/python docs/versions.py $(if $(RELEASE),--write)

.venv-audit/.ready: .venv/.test
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	@touch $@

audit: .venv-audit/.ready
	@$(BIN)/python .ci/audit.py .venv-audit/bin/python

# The tools measured beside this one live in an environment of their own.
#	RecBole asks for an old ray, to tune with: it comes without what it asks for, and what it uses is named.
bench-env: .venv-bench/.ready
.venv-bench/.ready: pyproject.toml Makefile
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,milvus,torchrec]' \
	  'torch-rechub>=0.9,<0.10' 'onnxscript>=0.5' 'implicit>=0.7' 'scipy>=1.11' 'bm25s>=0.2' 'scikit-learn>=1.4' \
	  'pandas>=2.2,<3' tqdm colorlog colorama pyyaml tensorboard thop tabulate texttable psutil
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'recbole>=1.2,<2' \
	  $$(.venv-bench/bin/python -c 'from twotower.train.torchrec.embeddings import torchrec_requirements; print(*torchrec_requirements())')
	@touch $@

# Every number with its script: hours. QUICK=1: a small version of each, minutes, whose numbers are worth nothing.
# Again from where it stopped, or some steps: make bench DATA=… FLAGS=--resume, FLAGS='--only train_speed,export_speed'
bench: bench-env
	@test -n "$(DATA)" || { echo "error: name the archive: make bench DATA=path/to/ml-1m.zip"; exit 2; }
	TWOTOWER_DATA="$$(realpath "$(DATA)")" .venv-bench/bin/python -m benchmarks suite --date "$(DATE)" $(ORDER) \
	  --run $(if $(QUICK),runs/bench-quick --quick,runs/bench) $(FLAGS)

bench-gpu: bench-env
	@test -n "$(DATA)" || { echo "error: name the archive: make bench-gpu DATA=path/to/ml-1m.zip"; exit 2; }
	TWOTOWER_DATA="$$(realpath "$(DATA)")" .venv-bench/bin/python -m benchmarks speed.gpu --out runs/bench/gpu_speed.json

clean:
	rm -rf .venv .venv-bench .venv-audit .venv-docs .venv-dist .venv-spark build dist src/*.egg-info
