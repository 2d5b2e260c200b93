"""``python -m nncf_ext.cli`` is ``nncf-ext``."""

from nncf_ext.cli import app

app()
