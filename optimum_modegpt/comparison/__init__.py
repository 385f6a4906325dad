"""A model beside the one it should replace: prompt by prompt, on one page, and on live requests."""
