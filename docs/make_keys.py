"""Write docs/keys.md from the schema: python docs/make_keys.py"""

from pathlib import Path

from hymba_train.config import document_keys_markdown

PAGE = Path(__file__).with_name("keys.md")


def page() -> str:
    """The page as it should be."""
    return (
        "# Every key\n\nMade from the schema by `python docs/make_keys.py`. NAME stands for a name you choose.\n\n"
        + document_keys_markdown()
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
