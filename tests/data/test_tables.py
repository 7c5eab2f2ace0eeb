from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from undiffuse.data import open_dataset
from undiffuse.data.tables import write_table
from undiffuse.errors import UndiffuseError

ROWS = "\n".join(f"{i / 7},{i * i},{'ab'[i % 2]}" for i in range(20))


def table(tmp_path: Path, text: str, encoding: str = "utf-8") -> str:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_columns_are_named_coordinates(tmp_path: Path) -> None:
    data = open_dataset(table(tmp_path, f"width,height (cm),kind\n{ROWS}\n"), labels="kind")
    assert (data.spec.kind, data.spec.shape) == ("points", (2,))
    assert data.spec.names == ("width", "height (cm)")
    assert data.spec.classes == ("a", "b")
    np.testing.assert_array_equal(data.values([14])[0], [2.0, 196.0])
    values = data.values(range(20))
    (tmp_path / "b.csv").write_bytes(write_table(data.spec.names, values))
    np.testing.assert_array_equal(open_dataset(str(tmp_path / "b.csv")).values(range(20)), values)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_marks_and_quotes(tmp_path: Path, delimiter: str) -> None:
    text = f'"x"{delimiter}"größe, m"\r\n1{delimiter}2\r\n\r\n3{delimiter}"-4"\r\n5{delimiter}1\r\n'
    data = open_dataset(table(tmp_path, text, "utf-8-sig"))
    assert data.spec.names == ("x", "größe, m")
    assert data.spec.dtype == "int64"  # whole numbers come back whole
    np.testing.assert_array_equal(data.spec.to_data(data.batch(range(3))[0]), [[1, 2], [3, -4], [5, 1]])
    again = tmp_path / "b.csv"
    again.write_bytes(write_table(data.spec.names, data.values(range(3))))
    assert open_dataset(str(again)).spec.names == data.spec.names


def test_without_names_rows_are_series(tmp_path: Path) -> None:
    values = np.sin(np.arange(5 * 30)).reshape(5, 30)
    data = open_dataset(table(tmp_path, "\n".join(",".join(map(str, row)) for row in values)))
    assert (data.spec.kind, data.spec.shape, data.spec.original_shape) == ("array", (1, 30), (30,))
    np.testing.assert_array_equal(data.values(range(5)), values)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n3,x\n", r"line 3: column 'b' holds 'x'.*--labels b"),
        ("a,b\n1,2\n3,\n", r"line 3: column 'b' holds 'nothing'"),
        ("a,b\n1,2\n3,nan\n", r"line 3.*'nan'"),
        ("a,b\n1,2\n3,inf\n", r"line 3.*'inf'"),
        ("a,b\n1,2\n3,4,5\n", "line 3: 3 cells, but 2"),
        ("a,a\n1,2\n", "same name"),
        ("a,\n1,2\n", "same name, or one has none"),
        ("a;b\n1,5;2,5\n2,5;3\n", "holds '1,5'"),
        ("a,b\n1," + "9" * 2000 + "\n", "more than 1000 characters"),
        ("a,b\n1," + "9" * 200_000 + "\n", "field larger than field limit"),
    ],
)
def test_what_is_not_numbers_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UndiffuseError, match=says) as error:
        open_dataset(table(tmp_path, text))
    assert "\n" not in str(error.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="UTF-8"):
        open_dataset(table(tmp_path, "a,b\n1,2\n", "utf-16"))
    with pytest.raises(UndiffuseError, match="did you mean 'kind'"):
        open_dataset(table(tmp_path, f"w,h,kind\n{ROWS}"), labels="kinds")
    with pytest.raises(UndiffuseError, match="every value"):
        open_dataset(table(tmp_path, "a,b\n1,1\n1,1\n"))
