"""What people look at: the reports of a study, their tables and their figures. Nothing is judged here.

``outputs``           writes the pages of a study, whichever kind it is
``comparison``        the report of a small comparison
``comparison_table``  its table: the original report's, with three columns more
``factorial``         the report of the factorial study, as HTML and as Markdown
``factorial_tables``  its tables
``figures``           a package: the figures of both
``table``             a table as text, Markdown and HTML
``markup``            style sheet and pieces of an HTML page
``glossary``          the metrics in a few words each
"""

from __future__ import annotations

from bitnet_ext.collapse.pages.outputs import write_pages

__all__ = ["write_pages"]
