"""The page of ``pfungst view``: findings looked at and judged in a browser on this machine, without any network."""
