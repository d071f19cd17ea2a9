"""Install nanomath: `pip install -e . -c constraints.txt`. Editable, in an environment of its own:
the top-level `kernels` package would shadow the PyPI package of that name."""

from setuptools import setup

ROOMS = ("base", "text", "judge", "tasks", "corpus", "engine", "hub", "run", "measure", "play")
HUB = ["huggingface_hub>=0.34", "tokenizers>=0.22"]

setup(
    name="nanomath",
    version="0.1.0",
    description="DeepSeekMath at small scale: from web pages to a policy trained by GRPO",
    license="MIT",
    python_requires=">=3.11,<3.15",
    packages=["kernels", "nanomath", *(f"nanomath.{room}" for room in ROOMS)],
    package_data={"nanomath.corpus": ["url_rules.tsv"]},
    install_requires=[
        "torch>=2.11,<2.16",
        # Each CUDA build of torch asks for one triton, its CPU builds for none.
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy>=1.26",
        "tiktoken>=0.9",
        "regex",
        "fasttext-community>=0.11",  # the maintained wheel of the fastText module
        "tqdm",
        "safetensors>=0.5",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        # nanomath.hub.download of models, and their tokenizers
        "hub": HUB,
        "test": ["pytest>=8", "hypothesis", "ruff", "transformers>=4.57", *HUB],
        # what tests and bench/ compare with
        "peers": ["math-verify[antlr4_13_2]>=0.9", "trl>=1.16", "liger-kernel>=0.8.5"],
    },
)
