"""The steps of `compress`: request, state, checks, planning, guards, checkpoint, record and self-check."""
