"""Shapes and types of tokdyn's signatures are checked while the tests run."""

from jaxtyping import install_import_hook

hook = install_import_hook("tokdyn", "beartype.beartype")
