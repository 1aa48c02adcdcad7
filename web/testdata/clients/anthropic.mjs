import Anthropic from '@anthropic-ai/sdk';
import { options, show } from './llm.mjs';

const client = new Anthropic(options());
await show(
  () => client.messages.create({ model: 'any', max_tokens: 1000, messages: [{ role: 'user', content: 'Tea?' }], stream: true }),
  ({ type, index, content_block, delta }, add) => {
    if (type === 'content_block_start' && content_block.type === 'tool_use') add(`tool ${index}`, content_block.name);
    if (type !== 'content_block_delta') return;
    if (delta.type === 'text_delta') add('content', delta.text);
    if (delta.type === 'thinking_delta') add('thinking', delta.thinking);
    if (delta.type === 'input_json_delta') add(`arguments ${index}`, delta.partial_json);
  },
);
