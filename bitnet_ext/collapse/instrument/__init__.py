"""The metrics themselves, checked on predictors whose health is known."""
