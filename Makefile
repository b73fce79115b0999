# make demo                      hear it work, from nothing, in a few minutes
# make demo SONG="my song.mp3"   and separate a recording of yours at the end
# make test                      lint, format and tests
# make web                       separate songs and live sound in a browser, on this machine
# make site                      the same as a folder for any web server

PORT ?= 8000
PYTHON ?= $(shell command -v python3.11 || command -v python3)

# Through the environment, unexpanded: a name may hold spaces, quotes and dollars.
export SONG_FILE := $(value SONG)

.PHONY: demo test web site

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

# The page that separates in a browser: a folder that any static host can serve.
ORT = web/node_modules/onnxruntime-web/dist
FFT = web/node_modules/@echogarden/kissfft-wasm
PAGE = $(wildcard web/*.html web/*.css web/*.js web/*.svg)

web: site
	@echo "Open http://localhost:$(PORT) (Ctrl-C ends it)"
	@.venv/bin/python -m http.server --bind localhost --directory site $(PORT)

site: web/node_modules/ready web/model.onnx web/model_small.onnx
	mkdir -p site/ort
	cp $(FFT)/kissfft.* $(FFT)/COPYING site/ort/
	cp $(PAGE) web/model.onnx web/model_small.onnx LICENSE site/
	cp $(ORT)/ort.wasm.min.mjs $(ORT)/ort-wasm-simd-threaded.mjs $(ORT)/ort-wasm-simd-threaded.wasm site/ort/
	cp $(ORT)/ort.webgpu.min.mjs $(ORT)/ort-wasm-simd-threaded.asyncify.* site/ort/

web/node_modules/ready: web/package-lock.json
	npm ci --prefix web --no-audit --no-fund
	touch $@

web/model.onnx: pretrained/resnet18.pth tools/export.py model.py .venv/ready-to-test
	.venv/bin/python -m tools.export $< web/model.onnx

web/model_small.onnx: pretrained/resnet18_small.pth tools/export.py model.py .venv/ready-to-test
	.venv/bin/python -m tools.export $< web/model_small.onnx
