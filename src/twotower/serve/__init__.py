"""A published bundle over HTTP: `twotower serve`.

supervisor.py     worker processes                        worker.py           one worker: its servers, its end
connections.py    connections and their timeouts          http_protocol.py    the protocol of one connection
connection_limits.py  most connections of a worker        middleware.py       every request: queue, access log
app.py            applications of both ports              routes/             routes by group, with errors
service.py        replies to requests                     recommender.py      answers, also without an index
schemas.py        bodies of requests                      replies.py          bodies of replies
request_limits.py limits of one request                   request_body.py     the body of a request, within its limits
admission.py      fair queueing between clients           client_limits.py    limits of a client outside the queue
access_policy.py  keys, hosts and origins                 api_keys.py         the file of API keys
problems.py       errors (RFC 9457)                       json_log.py         the log, one JSON object a line
bundles.py        the current bundle and its replacement  file_reader.py      reads of a store that may hang
free_memory.py    memory that a bundle may take           circuit_breaker.py  calls to a server that fails
user_events.py    recent events in this process           redis_events.py     recent events in Redis
histories.py      recent events, bounded in bytes         search_executor.py  searches of a remote index
console.py        data of the console at /                console_replies.py  replies of the console
item_map.py       the map of the console                  metrics.py          metrics for Prometheus
settings.py       settings and their checks
page/             the console: HTML, CSS, JavaScript

Needs the extra `serve`. No torch: the towers are ONNX graphs.
"""
