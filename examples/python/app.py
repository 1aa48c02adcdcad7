"""A FastAPI back end: it has a model of its own, and lets Gapless carry the answers.

    pip install fastapi uvicorn      (Debian: python3-fastapi, uvicorn)
    uvicorn app:app --port 8000
    curl -X POST '127.0.0.1:8000/ask/demo?question=Why'

The page follows http://127.0.0.1:8080/v1/sessions/demo/stream meanwhile. It loses nothing when either of them is restarted.
"""
import os
import time
import uuid

from fastapi import BackgroundTasks, FastAPI

from gapless import Producer

NODES = os.environ.get("GAPLESS_NODES", "http://127.0.0.1:8080").split(",")
app = FastAPI()


def model(question: str):
    """Stands for your model: yields words, with the pauses of a real one."""
    for i in range(60):
        time.sleep(0.03)
        yield f"word{i} "


def answer(session: str, message: str, question: str) -> None:
    producer = Producer(NODES, session, message)
    producer.append({"type": "message", "role": "user", "content": question, "message_id": "q-" + message})
    for word in model(question):
        producer.append({"content": word, "message_id": message})
    producer.append({"type": "done", "message_id": message})


@app.post("/ask/{session}", status_code=202)
def ask(session: str, question: str, later: BackgroundTasks):
    message = uuid.uuid4().hex
    later.add_task(answer, session, message, question)
    return {"message_id": message}
