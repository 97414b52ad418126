"""The page at / of the server, for people: a tab for each task, made with Gradio, over the HTTP API and nothing else.

`mount.py` puts it onto the server; `gateway.py` lets browsers at Gradio, and at no more of it than the page needs, and
`sign_in.py` asks them for the server's key. `client.py` asks the API. `layout.py` is the page as a whole, `tab.py` the
form of one task, `watch.py` a job while it is made, and `markup.py` the HTML of what is no form. Only this room imports
Gradio.
"""
