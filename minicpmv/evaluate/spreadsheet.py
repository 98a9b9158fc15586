"""Writes a table as .xlsx, for servers that take nothing else: one sheet of plain texts, in the least of Office Open XML."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape


NAMESPACE = "http://schemas.openxmlformats.org"
CONTROLS = dict.fromkeys(code for code in range(32) if chr(code) not in "\t\n\r")  # XML cannot hold them
PARTS = {
    "[Content_Types].xml": f'''<Types xmlns="{NAMESPACE}/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Override PartName="/xl/workbook.xml" ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>
<Override PartName="/xl/sheet.xml" ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/>
</Types>''',
    "_rels/.rels": f'''<Relationships xmlns="{NAMESPACE}/package/2006/relationships">
<Relationship Id="r1" Type="{NAMESPACE}/officeDocument/2006/relationships/officeDocument" Target="xl/workbook.xml"/>
</Relationships>''',
    "xl/_rels/workbook.xml.rels": f'''<Relationships xmlns="{NAMESPACE}/package/2006/relationships">
<Relationship Id="r1" Type="{NAMESPACE}/officeDocument/2006/relationships/worksheet" Target="sheet.xml"/>
</Relationships>''',
    "xl/workbook.xml": f'''<workbook xmlns="{NAMESPACE}/spreadsheetml/2006/main" '''
    f'''xmlns:r="{NAMESPACE}/officeDocument/2006/relationships">
<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets>
</workbook>''',
}


def write_spreadsheet(path: Path, lines: Sequence[Sequence[str]]) -> None:
    """Write lines of texts; what XML cannot hold is left out of them."""
    rows = []
    for line in lines:
        texts = (escape(text.translate(CONTROLS)) for text in line)
        cells = (f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>' for text in texts)
        rows.append(f"<row>{''.join(cells)}</row>")
    sheet = (
        f'<worksheet xmlns="{NAMESPACE}/spreadsheetml/2006/main"><sheetData>{"".join(rows)}</sheetData></worksheet>'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in {**PARTS, "xl/sheet.xml": sheet}.items():
            file.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{text}')
