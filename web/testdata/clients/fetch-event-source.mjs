import { chunk, over, url } from './print.mjs';

globalThis.window = globalThis; // it is made for browsers
globalThis.document = new EventTarget();

const { fetchEventSource } = await import('@microsoft/fetch-event-source');
await fetchEventSource(url, {
  openWhenHidden: true,
  onmessage(e) {
    if (!e.event) chunk(e.id, e.data);
  },
});
over('resolved');
