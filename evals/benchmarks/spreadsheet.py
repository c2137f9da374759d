"""A minimal Excel writer for MMBench's server: one table as a zip of a few XML files."""

import io
import re
import zipfile
from collections.abc import Sequence
from xml.sax.saxutils import escape

SheetCell = str | int | float

_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff￾￿]")  # not part of XML
_MAX_CHARACTERS = 32_767  # of a cell
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_WRITTEN = (1980, 1, 1, 0, 0, 0)  # a fixed date for reproducible bytes

_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
    f'ContentType="{_TYPES}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
    f'ContentType="{_TYPES}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="rId1" '
    f'Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets><sheet name="Sheet1" sheetId="1" '
    'r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="rId1" '
    f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


def write_xlsx(table: Sequence[Sequence[SheetCell]]) -> bytes:
    """Build a workbook with one sheet; cells are numbers or texts, truncated at Excel's limit."""
    rows = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in table)
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{rows}</sheetData></worksheet>'
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as book:
        for name, part in [*_PARTS.items(), ("xl/worksheets/sheet1.xml", sheet)]:
            content = f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{part}'
            book.writestr(zipfile.ZipInfo(name, _WRITTEN), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _cell(value: SheetCell) -> str:
    if not isinstance(value, str):
        return f"<c><v>{value}</v></c>"
    text = escape(_FORBIDDEN.sub("", value)[:_MAX_CHARACTERS])
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
