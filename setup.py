"""Installation of minillm: `pip install -e .` (extras: workshop, tests, tensorboard, tiktoken)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

WORKSHOP = [  # what data_tools needs beyond training: readers, cleaning, topics, embeddings
    "datasets>=4,<6",
    "ftfy>=6.2",
    "gensim>=4.4,<5",
    "ijson>=3.2",
    "jieba>=0.42",
    "lxml_html_clean>=0.4",
    "protego>=0.4",
    "py3langid>=0.3",
    "pyarrow>=18",
    "pyldavis>=3.4.1",
    "requests>=2.32",
    "tomotopy>=0.13,<1",
    "trafilatura>=2,<3",
    "urllib3>=2.2",
    "xxhash>=3.4",
    "zstandard>=0.22",
]

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "minillm" / "__init__.py").read_text()).group(1)

setup(
    name="minillm",
    version=version,
    description="Train small language models with DeepSpeed, from raw text to a chat",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["minillm", "minillm.*", "data_tools", "data_tools.*"]),
    package_data={"data_tools": ["*.yaml", "*/*.yaml", "*/*.html"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "webdataset>=1.0.2,<2",
        "wandb>=0.20",
        "pydantic>=2.10",
        "pyyaml>=6",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "tqdm",
        "jinja2>=3.1",
        "ninja",
        "setuptools",
    ],
    extras_require={
        "workshop": WORKSHOP,
        "tests": [
            *WORKSHOP,
            *["accelerate>=1.1", "ipykernel>=6", "nbclient>=0.10", "nbformat>=5.10", "pytest>=8", "ruff>=0.6"],
            "pytest-xdist>=3.6",
            "tiktoken>=0.8",
        ],
        "tiktoken": ["tiktoken>=0.8"],
        "tensorboard": ["tensorboard"],
    },
)
