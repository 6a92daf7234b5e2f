# make demo   install what a user needs, then profile the embedded model: runs/demo/report.html
# make test   install all that developing needs, then lint, type-check and test; .ci/run adds what is in test-families, -benchmarks, -kernels, -portable, -studies and -matrix
# make test-kernels   Triton and CUDA compiled ahead of time, Triton interpreted, C++ under sanitizers    make test-studies   their quick forms
# make fuzz   the operators and readers on a million cases    make test-sanitized   C++ under sanitizers alone    make mutants   errors planted in the core
# make test-families   forces of every model shape, with and without LoRA, against one gradient per token
# make test-benchmarks  every benchmark in its quick form, and the sweep's kinds of the day
# make test-portable  the numeric tests once more on code without AVX, as on a processor that has none
# make lint   ruff and mypy alone        make docs   the documentation site, without a warning: site/        make clean
# make wheel  build wheels, and run the demo from one in a fresh environment that has no compiler
# make studies   every phenomenon of the papers in full, some hours, goes on where it was: runs/studies, docs/gallery.md (DATA=texts)
# make sweep  every kind of causal LM against autograd, in chunks of minutes: run it until it is done, docs/families.md
# make test-matrix   the training tests against TRL 1.12, PEFT 0.20, verl, OpenRLHF and SkyRL's losses, in an environment of their own

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c \
	'import sys; (3, 11) <= sys.version_info < (3, 14) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo studies test fuzz mutants test-families test-benchmarks test-kernels test-matrix test-portable test-sanitized test-studies lint docs sweep wheel wheel-demo clean

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "tokdyn needs Python 3.11, 3.12 or 3.13; none found (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# the constraints first: torch alone, so that a later failure does not cost the largest download again
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing torch into $(VENV) (the largest download)"
	@$(PIP) torch
	@touch $@

# editable: edits to Python files are live, and only a change named here installs (and compiles) again
$(VENV)/.user: $(VENV)/.torch pyproject.toml setup.py tokdyn/_version.py $(NATIVE)
	@echo "installing tokdyn and what it needs into $(VENV), compiling csrc/ (under a minute)"
	@$(PIP) -e .
	@touch $@

# the requirements of the extra alone: to name it together with `-e .` would compile csrc/ once more
$(VENV)/.installed: $(VENV)/.user
	@echo "installing what developing tokdyn needs into $(VENV)"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/dev.txt
	@$(PIP) -r $(VENV)/dev.txt
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.user
	$(BIN)/tokdyn profile --out $(RUN) --overwrite

studies: install
	$(BIN)/tokdyn study --all --docs docs $(if $(DATA),--data $(DATA))

MINUTES := 5

sweep: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --peft --minutes $(MINUTES)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --minutes $(MINUTES) --markdown docs/families.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

STUDIES := tests/studies/test_language.py tests/studies/test_classification.py
BENCH := tests/bench
FAMILIES := tests/exact/test_architectures.py
SANITIZED := tests/kernels/test_sanitized.py
KERNELS := tests/kernels/test_ahead_of_time.py tests/kernels/test_interpreter.py $(SANITIZED)
XDIST := -n 2 --dist loadfile # two processes of one thread each, a file in one of them

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=10 $(XDIST) $(patsubst %,--ignore=%,$(STUDIES) $(KERNELS) $(BENCH) $(FAMILIES))

test-families: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=10 -n 2 $(FAMILIES)

test-benchmarks: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=10 $(XDIST) $(BENCH)

test-kernels: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=10 $(XDIST) $(KERNELS)

test-sanitized: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q $(SANITIZED)

CASES := 1000000

fuzz: install
	$(BIN)/python tests/fuzz.py --cases $(CASES)

mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --number 200 --markdown docs/mutants.md

NUMERIC := $(filter-out %architectures.py %kinds.py %memory.py,$(wildcard tests/exact/test_*.py)) tests/test_forces.py tests/test_forces_under_optimizers.py tests/test_profile.py tests/ops $(wildcard tests/kernels/test_native_*.py)
WITHOUT_AVX := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 # torch's loops, its BLAS, its oneDNN

test-portable: install
	$(WITHOUT_AVX) OMP_NUM_THREADS=1 $(BIN)/pytest -q --simd=portable --durations=10 $(XDIST) $(NUMERIC)

test-studies: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=20 -n 2 --studies runs/quick $(STUDIES)
	$(BIN)/tokdyn study --all --quick --out runs/quick # the page of all; those that are tested are finished

MATRIX := .venv-matrix
TRAINING := tests/training tests/checks tests/test_monitor.py tests/test_objectives_of_stacks.py \
	$(patsubst %,tests/integrations/test_%.py,distributed intervene own_loops packages stacks trainers)
OLD := trl==1.12.0 peft==0.20.0 requests # TRL 1.12 imports requests without asking for it
STACKS := verl==0.9.1 openrlhf==0.11.2 # alone: they ask for a GPU's packages; what is tested of them runs with these
STACKS_NEED := ray==2.60.0 tensordict==0.15.3 codetiming omegaconf orjson loguru
SKYRL := skyrl-train==0.3.1 # for Python 3.12 alone by its own word; only its file of losses is tested

$(MATRIX)/.installed: constraints.txt pyproject.toml setup.py tokdyn/_version.py
	@test -n "$(PYTHON)" || { echo "tokdyn needs Python 3.11, 3.12 or 3.13; none found (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(MATRIX)
	@grep -vE '^(trl|peft)==' constraints.txt > $(MATRIX)/constraints.txt
	@echo "installing tokdyn with $(OLD) $(STACKS) into $(MATRIX)"
	@$(MATRIX)/bin/python -m pip install --disable-pip-version-check -q -c $(MATRIX)/constraints.txt torch
	@$(MATRIX)/bin/python -m pip install --disable-pip-version-check -q -c $(MATRIX)/constraints.txt -e '.[dev]' $(OLD) $(STACKS_NEED)
	@$(MATRIX)/bin/python -m pip install --disable-pip-version-check -q --no-deps $(STACKS)
	@$(MATRIX)/bin/python -m pip install --disable-pip-version-check -q --no-deps --ignore-requires-python $(SKYRL)
	@touch $@

test-matrix: $(MATRIX)/.installed
	OMP_NUM_THREADS=1 $(MATRIX)/bin/pytest -q --durations=10 -n 2 $(TRAINING)

WHEEL_PYTHONS ?= $(PYTHON) # e.g. make wheel WHEEL_PYTHONS="python3.11 python3.12 python3.13"
WHEEL_HOLDS := tokdyn/demo/model/model.safetensors tokdyn/demo/model/tokenizer.json tokdyn/demo/pairs.jsonl \
	tokdyn/report/page.html.jinja tokdyn/report/static/page.css tokdyn/report/static/main.js \
	tokdyn/report/training.html.jinja tokdyn/report/static/training/training.css \
	$(wildcard tokdyn/report/static/training/*.js) tokdyn/py.typed tokdyn/kernels/token_stats/reference.py \
	tokdyn/studies/gallery.css tokdyn/studies/squeeze.json \
	tokdyn/_C.

WHEEL_VENV := .venv-wheel

# isolated builds of the sdist, as an installer makes them; auditwheel names the oldest Linux that a wheel runs on
wheel: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build --sdist --outdir dist .
	@for python in $(WHEEL_PYTHONS); do \
		$$python -m pip wheel --disable-pip-version-check -q --no-deps -w dist/linux dist/tokdyn-*.tar.gz || exit 1; done
	@for wheel in dist/linux/*.whl; do PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist $$wheel || exit 1; done
	@for wheel in dist/*.whl; do $(BIN)/python -m zipfile -l $$wheel > dist/contents.txt; \
		for held in $(WHEEL_HOLDS); do grep -qF "$$held" dist/contents.txt || { echo "$$wheel lacks $$held" >&2; exit 1; }; done; \
		! grep -E '^(kernels|tests)/' dist/contents.txt || { echo "$$wheel installs a top-level folder" >&2; exit 1; }; done
	@test -z "$$(find dist -name '*.whl' -size +20000k)" || { echo "a wheel is over 20 MB" >&2; exit 1; }
	@ls -l dist/*.whl
	@$(MAKE) wheel-demo

# from the wheel alone: no compiler, no folder of this repository
wheel-demo:
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	@$(WHEEL_VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		dist/tokdyn-*-$$($(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl
	cd dist && env -i PATH="$(CURDIR)/$(WHEEL_VENV)/bin" HOME="$$HOME" tokdyn profile --out ../runs/wheel --overwrite
	@cd dist && env -i PATH="$(CURDIR)/$(WHEEL_VENV)/bin" HOME="$$HOME" tokdyn doctor

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist site $(WHEEL_VENV) *.egg-info runs/demo .pytest_cache .ruff_cache .mypy_cache tokdyn/_C.*.so $(VENV)/.user
	find tokdyn kernels tests -name __pycache__ -prune -exec rm -rf {} +
