# make demo                      hear it work, from nothing, in a few minutes
# make demo SONG="my song.mp3"   and separate a recording of yours at the end
# make test                      lint, format and tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)

# Through the environment, unexpanded: a name may hold spaces, quotes and dollars.
export SONG_FILE := $(value SONG)

.PHONY: demo test

demo: .venv/ready
	.venv/bin/python -m demo $${SONG_FILE:+--song="$$SONG_FILE"}

test: .venv/ready-to-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

# The stamps come last, so that an interrupted installation is taken up again.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@

.venv/ready-to-test: requirements-dev.txt .venv/ready
	.venv/bin/python -m pip install --requirement requirements-dev.txt
	touch $@
