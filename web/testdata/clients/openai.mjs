import OpenAI from 'openai';
import { options, show } from './llm.mjs';

const client = new OpenAI(options());
await show(
  () => client.chat.completions.create({ model: 'any', messages: [{ role: 'user', content: 'Tea?' }], stream: true }),
  ({ choices }, add) => {
    for (const { delta } of choices) {
      if (delta.content) add('content', delta.content);
      for (const call of delta.tool_calls ?? []) {
        if (call.function.name) add(`tool ${call.index}`, call.function.name);
        add(`arguments ${call.index}`, call.function.arguments);
      }
    }
  },
);
