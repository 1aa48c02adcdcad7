// What each client prints: a line of JSON for each chunk, [id, data], and at last how it
// ended, {over}.

export const url = process.argv[2];

export function chunk(id, data) {
  process.stdout.write(JSON.stringify([id, data]) + '\n');
}

export function over(how) {
  process.stdout.write(JSON.stringify({ over: how }) + '\n', () => process.exit(0));
}
