"""Any torch model -> its dimensions: which indices of which axes can only change together, found by one forward."""
