"""A published bundle over HTTP: `twotower serve`.

supervisor.py     worker processes                        worker.py           one worker: its servers, its log, its end
connections.py    connections, their protocol and limits  middleware.py       every request: body, queue, access log
access_policy.py  keys, hosts, origins and rates          api_keys.py         the file of API keys
admission.py      fair queueing between clients           routes/             routes by group, with errors
service.py        replies to requests                     search_executor.py  searches of a remote index
schemas.py        bodies and parameters of requests       replies.py          bodies of replies
problems.py       errors (RFC 9457)                       circuit_breaker.py  calls to a server that fails
bundles.py        the current bundle and its replacement  file_reader.py      reads of a store that may hang
user_events.py    recent events in this process           redis_events.py     recent events in Redis
console.py        data of the console at /, and its map   metrics.py          metrics for Prometheus
settings.py       settings and their checks
page/             the console: HTML, CSS, JavaScript

Needs the extra `serve`. No torch: the towers are ONNX graphs.
"""
