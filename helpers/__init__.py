"""What the notebooks call: measuring, formatting, checking, hand-off. Import the modules; nothing happens here."""

__version__ = "0.1.0"
