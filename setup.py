"""Packaging. Tool settings are in pyproject.toml; exact tested versions are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"  # also hymba_train.__version__; a test holds the two together

setup(
    name="hymba-train",
    version=VERSION,
    description="Distributed pretraining of Hymba hybrid-head language models on Megatron-Core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["hymba_train*", "data_prep*", "launch*"]), "hymba_train_recipes"],
    # The Hydra tree stands beside the package in a checkout and is a package of data in a wheel.
    package_dir={"hymba_train_recipes": "recipes"},
    package_data={
        "hymba_train": ["ops/cuda/*", "plan/*.yaml"],
        "hymba_train_recipes": ["*.yaml", "*/*.yaml"],
        "data_prep": ["corpus/*"],
        "launch": ["*.sh"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "packaging",
        "psutil",  # megatron.core.dist_checkpointing needs both, undeclared
        "pyyaml",
        "hydra-core>=1.3.2,<1.4",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "orjson>=3.10",
        "safetensors>=0.4",
        "rich>=13",
        "matplotlib>=3.8",
        "tensorboard>=2.14",
        "xxhash>=3.4",  # checksums of checkpoint files
    ],
    extras_require={
        # CUDA packages; build them with --no-build-isolation after torch (README, "On a GPU").
        "gpu": [
            "transformer-engine[pytorch]>=2.8",
            "mamba-ssm>=2.2.6",
            "causal-conv1d>=1.5",
            "flash-attn>=2.8",
            "triton>=3.2",
        ],
        "wandb": ["wandb>=0.18"],
        "hf": ["transformers>=4.50,<6"],  # convert's checks, generate, eval
        "eval": ["transformers>=4.50,<6", "lm-eval[hf]>=0.4.9"],
        # zstd and Parquet input, near-duplicates (0.5 changed the signatures), the fast tokenizer, object stores
        "data": ["zstandard>=0.22", "pyarrow>=15", "rensa>=0.5,<0.6", "gigatoken>=0.10", "fsspec>=2024.6"],
        "docs": ["mkdocs-material>=9.5,<10"],
        "dev": [
            "hymba-train[hf,data]",
            "coverage>=7.10",  # measures the children of tests
            "pytest>=8",
            "pytest-timeout",
            "hypothesis",
            "import-linter>=2.4",  # "protected" contracts
            "mypy",
            "ruff",
            "setuptools>=77",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["hymba=hymba_train.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
