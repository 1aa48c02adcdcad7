// The API reference: Swagger UI on this node's own openapi.yaml. What a stream is, it does not
// know: it shows an answer when the answer is over. So streams are cut here, after a while.

const moment = 5000; // ms that a stream is shown for

// A stream's answer as far as it came in a moment, and why it ends there.
async function taste(url, request) {
  const stop = new AbortController();
  let text = '', why = '';
  const timer = setTimeout(() => {
    why = `: this page stops reading after ${moment / 1000} s; a stream goes on: curl -N '${url}'\n`;
    stop.abort();
  }, moment);
  const answer = await fetch(url, { ...request, signal: stop.signal }).catch(err => {
    clearTimeout(timer);
    throw err;
  });
  try {
    const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece; reader && !(piece = await reader.read()).done;) text += piece.value;
  } catch (err) {
    why ||= `: the stream broke off (${err.message}): an EventSource comes back with the last id\n`;
  }
  clearTimeout(timer);
  const empty = [204, 205, 304].includes(answer.status);
  const { status, statusText, headers } = answer;
  const shown = new Response(empty ? null : text + why, { status, statusText, headers });
  Object.defineProperty(shown, 'url', { value: url });
  return shown;
}

function intercept(request) {
  if (/\/v1\/sessions\/[^/]+\/stream(\?|$)/.test(request.url)) request.userFetch = taste;
  return request;
}

// Swagger UI fills in every example. Those of parameters that need not be there would make a
// producer, a cursor and a ticket of everybody; `until=done` alone is what a first try wants.
function plain(contract) {
  for (const item of Object.values(contract.paths ?? {})) {
    for (const operation of Object.values(item)) {
      for (const p of operation?.parameters ?? []) {
        if (p.required || p.$ref) continue;
        delete p.example;
        delete p.examples;
        if (p.name === 'until') p.schema = { ...p.schema, default: 'done' };
      }
    }
  }
  return contract;
}

const ownContract = () => ({
  statePlugins: { spec: { wrapActions: { updateJsonSpec: update => contract => update(plain(contract)) } } },
});

const dark = matchMedia('(prefers-color-scheme: dark)');
const colour = () => document.documentElement.classList.toggle('dark-mode', dark.matches);
dark.addEventListener('change', colour);
colour();

document.getElementById('skip').addEventListener('click', e => {
  e.preventDefault(); // the address is Swagger UI's
  const first = document.querySelector('.opblock-tag-section');
  first?.scrollIntoView();
  first?.querySelector('button, a')?.focus({ preventScroll: true });
});

window.SwaggerUIBundle({
  url: '/openapi.yaml',
  domNode: document.getElementById('docs'),
  plugins: [ownContract],
  requestInterceptor: intercept,
  deepLinking: true,
  docExpansion: 'list',
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null, // it is somebody else's server
  withCredentials: true,
});
