"""The words of flowstead: frozen records, no behaviour beyond asking what they say."""
