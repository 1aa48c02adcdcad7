import { EventSource } from 'eventsource';
import { chunk, over, url } from './print.mjs';

setInterval(() => {}, 1000); // from version 5 on, its timer for the next attempt does not keep Node alive

const source = new EventSource(url);
source.onmessage = (e) => chunk(e.lastEventId, e.data);
source.onerror = (e) => {
  if (source.readyState === EventSource.CLOSED) over(`closed, ${e.code}`);
};
