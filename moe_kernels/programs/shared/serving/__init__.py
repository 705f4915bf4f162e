"""A page for the browser that draws and chats, and the JSON behind it (``docs/serving.md``).

`studio` computes the answers, `app` is their web page and needs the extra ``serve``, and `server`
runs it and is what programs import.
"""
