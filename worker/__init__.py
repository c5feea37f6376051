"""The processes, which the `innerloop` command starts.

Where each of them is:

    cli.py, columns.py   the command line, which hands over to all others
    processes.py         what an ingest or adapt process is made of
    pool.py, devices.py  several of them, on which device each
    health.py, gauges.py, endpoint.py, logs.py
                         what each of them tells of itself
    lag_watch.py, scrape.py
                         what can be told of all of them from outside
    quality/             what adaptation is worth, in windows, on Faust
    console/             the live page

    train.py, train_items.py, replay.py, evaluate.py, through_kafka.py
                         learning and measuring
    lag.py, scores.py, dlq.py, dead_letters.py, erase.py
                         one look, or one errand, of an operator
    demo/                all of it in one command
    servers/             a real Kafka and a real PostgreSQL, where none is set
"""
