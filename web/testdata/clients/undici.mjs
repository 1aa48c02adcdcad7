import { EventSource } from 'undici';
import { chunk, over, url } from './print.mjs';

setInterval(() => {}, 1000); // its timer for the next attempt does not keep Node alive

const source = new EventSource(url);
source.onmessage = (e) => chunk(e.lastEventId, e.data);
source.onerror = () => {
  if (source.readyState === EventSource.CLOSED) over('closed');
};
