"""From moments to smaller parts: the published algorithm and the residual-matched one, one page each."""
