"""A published bundle over HTTP: `twotower serve`.

supervisor.py     worker processes                        worker.py           one worker: its servers, its end
listener.py       listening sockets                       json_log.py         the log, one JSON object a line
connections.py    connections and their timeouts          http_protocol.py    the protocol of one connection
open_files.py     connections that open files allow       middleware.py       every request: queueing, the access log
app.py            applications of both ports              routes/             routes by group, their errors and documents
service.py        replies to requests                     recommender.py      answers of the retriever, or without an index
schemas.py        bodies of requests                      replies.py          bodies of replies
request_limits.py limits of one request                   problems.py         errors (RFC 9457)
admission.py      fair queueing between clients           client_slots.py     bounds on work beside the queue
access_policy.py  keys, hosts and origins                 request_body.py     the body of a request, within its limits
rate_limit.py     requests per second of a client         api_keys.py         the file of API keys
body_memory.py    memory of bodies and replies            free_memory.py      memory that a bundle may take
bundles.py        the current bundle and its replacement  file_reader.py      reads of a store that may hang
user_events.py    recent events in this process           redis_events.py     recent events in Redis
histories.py      recent events, bounded in bytes         circuit_breaker.py  calls to a server that fails
search_executor.py  searches of a remote index            console.py          data of the console at /
console_replies.py  replies of the console                item_map.py         the map of the console
metrics.py        metrics for Prometheus                  settings.py         settings and their checks
page/             the console: HTML, CSS, JavaScript

Needs the extra `serve`. No torch: the towers are ONNX graphs.
"""
