# @title Unpack the series as it was sent
import base64
import io
import tarfile
import tempfile
from pathlib import Path

place = Path(tempfile.mkdtemp(prefix="series-"))
with tarfile.open(fileobj=io.BytesIO(base64.b64decode(BUNDLE))) as archive:  # noqa: F821 (the line above this program)
    archive.extractall(place, filter="data")
