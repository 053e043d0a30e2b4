# Each target does all its own set-up in .venv. PYTHON is any Python from 3.11 on.
PYTHON ?= python3
RUN := .venv/bin/python
PROMPT := Quelle est la capitale de l'Espagne ? Madrid\nQuelle est la capitale de la France ?

.PHONY: demo test lint bench clean

# Lucie's recipe in miniature: data, three phases, a completion, what it knows, the curves.
demo: .venv/installed
	@date +%s > .venv/demo_started
	$(RUN) -m data.prepare demo --out out/demo_data
	$(RUN) train.py config/demo_pretrain.py
	$(RUN) train.py config/demo_extension.py
	$(RUN) train.py config/demo_annealing.py
	@echo
	$(RUN) generate.py out/demo_annealing --temperature 0 --max-new-tokens 40 --prompt "$(PROMPT)"
	@echo
	$(RUN) -m eval.capitals out/demo_annealing --at-least 0.9
	@echo
	$(RUN) -m eval.curves out/demo_pretrain out/demo_extension out/demo_annealing --png out/demo_curves.png
	@echo "the demo took $$(( $$(date +%s) - $$(cat .venv/demo_started) )) seconds"

test: .venv/installed
	$(RUN) -m pytest -q

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Training speed of the demo model against transformers' on this machine.
bench: .venv/installed
	$(RUN) -m bench.step

clean:
	rm -rf .venv out

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@
