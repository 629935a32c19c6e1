"""A published bundle over HTTP: `twotower serve`.

process.py      sockets, worker processes, signals      middleware.py       keys, limits, queueing, the access log
app.py          routes                                  service.py          answers to requests
schemas.py      bodies and replies                      problems.py         errors (RFC 9457)
console.py      data of the console at /                page/               the console: HTML, CSS, JavaScript
bundles.py      the current bundle and its replacement  file_reader.py      reads of a store that may hang
user_events.py  recent events, in process or in Redis   histories.py        recent events in this process, bounded in bytes
search_executor.py  searches of a remote index          admission.py        fair queueing between clients
body_memory.py  memory of bodies and replies            rate_limit.py       requests per second of a client
connections.py  connections and their timeouts          api_keys.py         the file of API keys
metrics.py      metrics for Prometheus                  settings.py         settings and their checks

Needs the extra `serve`. No torch: the towers are ONNX graphs.
"""
