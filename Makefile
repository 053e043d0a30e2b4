# Each target does all its own set-up in .venv. PYTHON is any Python from 3.11 to 3.14.
PYTHON ?= python3
# Which build of torch: on Linux the default one brings gigabytes of CUDA, so where there is no NVIDIA
# driver it is the one for CPUs. make TORCH=cpu or TORCH=default decides otherwise, after rm -r .venv.
DRIVER := $(wildcard /proc/driver/nvidia/version /usr/lib/wsl/lib/libcuda.so*)
TORCH ?= $(if $(DRIVER),default,$(if $(filter Linux,$(shell uname -s)),cpu,default))
$(if $(filter-out cpu default,$(TORCH)),$(error TORCH is cpu or default, not $(TORCH)))
RUN := .venv/bin/python

# A Python that has the requirements already may be given, as in `make gpu RUN=python3`.
INSTALLED := $(if $(filter .venv/%,$(RUN)),.venv/installed)
STATIC := .venv$(if $(TRITON),-triton-$(TRITON))
PYTEST := $(RUN) -m pytest -q -n auto --maxprocesses=4 --dist=worksteal

.PHONY: demo test test_slow test_all lint static gpu bench clean

# Lucie's recipe in miniature: data, three phases, what each of them taught, the curves. Another seed
# or dtype, in a folder of its own: make demo RUNS=out/seed_1 OPTIONS="--seed=1 --dtype=float32"
RUNS ?= out
PHASES := $(RUNS)/demo_pretrain $(RUNS)/demo_extension $(RUNS)/demo_annealing
TRAIN = $(RUN) train.py config/$(1).py --out_dir=$(RUNS) $(if $(2),--init_from=$(RUNS)/$(2)) $(OPTIONS)
demo: .venv/installed
	@date +%s > .venv/demo_started
	$(RUN) -m data.demo --out out/demo_data
	$(call TRAIN,demo_pretrain)
	$(call TRAIN,demo_extension,demo_pretrain)
	$(call TRAIN,demo_annealing,demo_extension)
	@echo
	$(RUN) -m eval.capitals $(PHASES)
	@echo
	$(RUN) -m eval.curves $(PHASES) --smooth 9 --png $(RUNS)/demo_curves.png
	@echo
	@echo "the demo took $$(( $$(date +%s) - $$(cat .venv/demo_started) )) seconds"
	@echo
	@echo "What next? (first run: source .venv/bin/activate)"
	@echo "  Ask it yourself:         python generate.py $(RUNS)/demo_annealing --temperature 0 --interactive"
	@echo "  Train on your own text:  docs/data.md"
	@echo "  The real recipe:         torchrun --nproc-per-node=8 train.py config/pretrain.py"
	@echo "  The kernels:             make static (no GPU needed), make gpu (on one)"

# Every day, in minutes. One test process a core, up to four: each computes with one thread.
test: .venv/installed
	$(PYTEST) -m "not slow"

# What is slow, exhaustive, or needs the benchmarks' packages.
test_slow: .venv/installed_eval
	$(PYTEST) -m slow

test_all: test test_slow

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# What the compiler makes of every kernel for an A100, RTX 3090, H100 and B200, none of which need be
# here. With another Triton, in an environment of its own: make static TRITON=3.6.0
static: $(STATIC)/installed
	$(STATIC)/bin/python -m bench.static --check

# On a CUDA machine, in some ten minutes: are the kernels right on the chip, and how fast are they, a
# training step of Lucie-7B and decoding beside their baselines? The results go to OUT. A part that
# fails stops none after it; make's exit code tells. make gpu TOY=--toy rehearses it on a CPU.
OUT ?= out/gpu
gpu: $(INSTALLED)
	-$(RUN) -m pip install -q --no-deps --retries 0 --timeout 10 liger-kernel==0.8.5
	@failed=0; \
	$(PYTEST) -m "gpu and not slow" || failed=1; \
	$(RUN) -m bench.kernels --out "$(OUT)" --minutes 2 $(TOY) || failed=1; \
	$(RUN) -m bench.step --out "$(OUT)" --minutes 4 $(TOY) || failed=1; \
	$(RUN) -m bench.decode --out "$(OUT)" --minutes 1 --rounds 1 $(TOY) || failed=1; \
	exit $$failed

# On a CPU, training speed of the demo's model against transformers'; on a GPU, that of Lucie-7B.
bench: .venv/installed
	$(RUN) -m bench.step

clean:
	rm -rf .venv .venv-triton-* out

define venv
$(PYTHON) -c "import sys; (3, 11) <= sys.version_info[:2] <= (3, 14) or sys.exit( \
	'Python 3.11 to 3.14 is needed, and $(PYTHON) is %d.%d: make PYTHON=python3.12' % sys.version_info[:2])"
$(PYTHON) -m venv $(1)
$(if $(filter cpu,$(TORCH)),$(cpu_torch))
endef

# It comes from where pip is told to look, such as a folder of wheels, or else from PyTorch's own
# index, since PyPI does not have it. Everything else comes from where pip looks.
define cpu_torch
@wheel=$$(grep ^torch== requirements.txt)+cpu; \
	echo "installing $$wheel, without CUDA (the build with CUDA: rm -r $(1), then make TORCH=default)"; \
	pip="$(1)/bin/python -m pip install -q --no-deps $$wheel"; \
	$$pip 2> $(1)/log || $$pip --index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15 || \
	{ cat $(1)/log; echo "$$wheel is not available: rm -r $(1), then make TORCH=default"; exit 1; }
endef

.venv/installed: requirements.txt requirements-dev.txt
	$(call venv,.venv)
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

.venv/installed_eval: .venv/installed requirements-eval.txt
	$(RUN) -m pip install -q -r requirements-eval.txt
	touch $@

.venv-triton-%/installed: requirements.txt
	$(call venv,.venv-triton-$*)
	.venv-triton-$*/bin/pip install -q $$(grep -E '^(torch|numpy|tqdm)==' requirements.txt)
	.venv-triton-$*/bin/pip install -q triton==$*
	touch $@
