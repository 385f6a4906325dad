"""Plugins of serving engines. An engine imports them; the package itself imports nothing from here."""
