"""Each named tensor computed again from its inputs, and the verdict on what the other side has."""
