"""A published bundle over HTTP: `twotower serve`.

process.py   sockets, workers, signals            door.py     what every request passes: keys, limits, turns, logs
app.py       the routes                           service.py  what is done for a request
console.py   what the page at / asks              bundles.py    the bundle that answers, and its replacement
live.py      what has happened since the bundle   wire.py     bodies, replies and problems as they travel
remote.py    searches that leave the process      histories.py  … kept in this process
gate.py      turns, shared out between clients    reader.py   work on a store that may hang
room.py      bytes that are under way             connections.py  how many, and how long each may keep it waiting

Needs `pip install -e '.[serve]'`. No torch: the towers are ONNX graphs.
"""
