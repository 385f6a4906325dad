"""The compression methods: the published algorithm and the residual-matched one."""
