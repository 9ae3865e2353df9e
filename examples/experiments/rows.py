"""Rows of an experiment, put together by what they have in common."""


def grouped(rows, *columns):
    """The value of a column, or a tuple of those of several → the rows with it, in order."""
    found = {}
    for row in rows:
        values = tuple(row[column] for column in columns)
        found.setdefault(values if len(columns) > 1 else values[0], []).append(row)
    return found


def nested(rows, first, second):
    """The value of one column → that of another → the rows with both, in order."""
    parts = grouped(rows, first).items()
    return {value: grouped(part, second) for value, part in parts}
