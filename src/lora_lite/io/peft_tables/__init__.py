"""One row a `peft_type`: which method it is here, and the change of variables."""
