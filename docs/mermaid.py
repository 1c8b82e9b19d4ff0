"""A hook of MkDocs that shows ```mermaid blocks as diagrams: in mkdocs.yml a function has no name in plain YAML."""

from pymdownx.superfences import fence_code_format


def on_config(config):
    fence = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
    config["mdx_configs"]["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config
